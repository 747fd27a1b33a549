"""Entry points: `python -m launch.train`, `.evaluate`, `.generate`, `.compare`, `.sweep` and others."""
