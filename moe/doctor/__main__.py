"""python -m moe.doctor, and torchrun -m moe.doctor."""

from moe.doctor.cli import main

if __name__ == "__main__":
    main()
