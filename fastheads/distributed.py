"""The public name of the job of several processes (`run.job`)."""

from fastheads.run.job import Job

__all__ = ["Job"]
