"""One setting for many tasks: ``python -m benchmarks.tasks``, by steps."""
