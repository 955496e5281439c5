"""A two-stage fine-tuning pipeline for image classifiers."""

import os

# Threads that wait should sleep, not spin, where another program wants the same processors. It
# changes no result, and has to be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
