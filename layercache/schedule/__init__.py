"""Schedules: which cells are computed, and what the others are made of."""

from layercache.schedule.fingerprint import Fingerprint as Fingerprint
from layercache.schedule.module_schedule import ModuleSchedule as ModuleSchedule
from layercache.schedule.schedule import Cell as Cell
from layercache.schedule.schedule import Schedule as Schedule
from layercache.schedule.schedule import Velocity as Velocity
from layercache.schedule.step_mask import StepMask as StepMask

__all__ = ["Cell", "Fingerprint", "ModuleSchedule", "Schedule", "StepMask", "Velocity"]
