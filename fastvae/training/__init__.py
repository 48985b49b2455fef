"""Training: one plain loop, its options, and what it leaves in the run folder."""

from fastvae.evaluation.density import bits_per_dim as bits_per_dim
from fastvae.evaluation.elbo import Evaluation as Evaluation
from fastvae.evaluation.objective import Objective as Objective

from .config import TrainConfig as TrainConfig
from .events import Event as Event
from .interruption import TrainingInterrupted as TrainingInterrupted
from .loop import TrainResult as TrainResult
from .loop import train as train
from .metrics import NonFiniteLossError as NonFiniteLossError
from .run_folder import RunFolderError as RunFolderError
from .run_lock import RunLockedError as RunLockedError
