"""What mixing costs, measured beside every peer: `python -m benchmarks`"""
import os
os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # before torch is imported: its profiler is talkative
