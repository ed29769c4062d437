"""Runs beside each other on one page: their figures over the steps, what differs between them, what a sweep has found."""
