"""A two-stage fine-tuning pipeline for image classifiers."""

import os
import signal
import sys

# Threads that wait should sleep, not spin, where another program wants the same processors. It
# changes no result, and has to be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Ctrl-C while a command (`python -m pipeline.NAME`) still imports its libraries ends it without a
# traceback; what has begun says how to go on.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
