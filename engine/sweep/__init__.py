"""Sweeps, ``-m``: what they run (``points``), where their runs stand (``status``), and how they are run (``start``, ``pool``)."""
