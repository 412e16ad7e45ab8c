"""moe-doctor: finds the traps in a run.

with doctor(model) as report:
    train_some_steps(model)
report.show()
"""

from moe.doctor.block import Block, Said, Weight, chosen, listening
from moe.doctor.session import doctor
from moe.doctor.symptom import Report, Symptom

__all__ = ["Block", "Report", "Said", "Symptom", "Weight", "chosen", "doctor", "listening"]
