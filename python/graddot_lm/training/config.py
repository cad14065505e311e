"""Where runs are written and where tokenized data is read, unless a flag says otherwise.

The environment variables RESULTS_DIR and PILE_DATA_DIR override these defaults; the flags
--results_dir and --pile_data_dir override both.
"""

import os
from pathlib import Path

RESULTS_DIR = Path(os.environ.get("RESULTS_DIR", "results"))
PILE_DATA_DIR = Path(os.environ.get("PILE_DATA_DIR", "data/pile"))
