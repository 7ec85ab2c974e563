"""Speed and its growth, measured side by side in one run: ``python -m lrpet.bench projection | inference | scaling``."""
