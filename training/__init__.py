"""Training of language models on flash_attn: ``python -m training.run experiment=tiny``.

Models, losses and attention are flash_attn's; Hydra composes the settings, torchdata and
torch.distributed order the data, run the processes and store the state. docs/training.md tells how.
"""

import sys
from pathlib import Path

# ``python -m`` puts the repository first on sys.path, where flash_attn/ has no built library: an
# installed flash_attn is to be found before it.
_ROOT = str(Path(__file__).resolve().parent.parent)
if sys.path and sys.path[0] == _ROOT:
    sys.path.append(sys.path.pop(0))
