"""Sweeps: trials as data, engines that start them, what every engine runs, and the records of all."""
