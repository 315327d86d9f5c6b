"""The scheduler: a sans-I/O state machine with no clock, thread, tensor, log or chance.

The engine drives it in real time, and a simulator can drive the same object in virtual time.
"""

from gllm_ray.scheduling.policies import make_policy
from gllm_ray.scheduling.scheduler import Scheduler
from gllm_ray.scheduling.settings import QueueLimits, SchedulerSettings

__all__ = ["QueueLimits", "Scheduler", "SchedulerSettings", "make_policy"]
