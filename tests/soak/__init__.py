"""A soak: outputs that live through nights of change, and runs that are killed at any moment.

`history` is one output's nights beside those of an undisturbed twin, `changes` what may happen
before a night, and `runs` how a run is started, killed and counted.
"""
