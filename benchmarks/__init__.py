"""What mixing costs, measured beside every peer: `python -m benchmarks`"""
import os
os.environ.update(KINETO_LOG_LEVEL='99', TORCH_CPP_LOG_LEVEL='ERROR')  # before torch is imported: its profiler is talkative
