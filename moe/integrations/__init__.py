"""Where people already work: one package for each host. Nothing in evenmoe imports them, and each is an extra."""
