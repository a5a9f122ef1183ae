"""Hide the packages named in K2LAB_TEST_WITHOUT from the processes that tests start.

A plain installation does not bring them. Where they are there, transformers and peft import them at
each start: four seconds of processor time, used by no run of the tests."""

import os
import sys

for name in os.environ.get('K2LAB_TEST_WITHOUT', '').split():
    sys.modules[name] = None  # `import name` raises ImportError, and find_spec finds nothing
