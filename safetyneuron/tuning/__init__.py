"""Core: SN-Tune, what it leaves behind, and the trainings it is compared with."""
