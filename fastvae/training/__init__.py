"""Training: one plain loop, its options, and what it leaves in the run folder."""

from .config import TrainConfig as TrainConfig
from .evaluation import Evaluation as Evaluation
from .events import Event as Event
from .interruption import TrainingInterrupted as TrainingInterrupted
from .loop import TrainResult as TrainResult
from .loop import train as train
from .metrics import NonFiniteLossError as NonFiniteLossError
from .metrics import bits_per_dim as bits_per_dim
from .objective import Objective as Objective
from .run_folder import RunFolderError as RunFolderError
from .run_lock import RunLockedError as RunLockedError
