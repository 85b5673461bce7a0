"""What a method of one's own is made of, under the name that method authors import it by."""

from layercache.runtime.policy import Decider as Decider
from layercache.runtime.policy import DynamicMethod as DynamicMethod
from layercache.runtime.policy import Observation as Observation
from layercache.runtime.policy import PlannedMethod as PlannedMethod
from layercache.runtime.policy import PlannedModules as PlannedModules
from layercache.runtime.policy import RowDecider as RowDecider
from layercache.runtime.policy import RowMethod as RowMethod
from layercache.runtime.policy import Run as Run
from layercache.runtime.policy import StepDecider as StepDecider
from layercache.runtime.policy import StepMethod as StepMethod
from layercache.runtime.policy import check_range as check_range
