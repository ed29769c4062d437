"""The reference of DPO: its log-probabilities, computed before training (``attach``) and kept for later runs (``store``)."""
