"""Real images as data sets: an embedded set, folders, NumPy and IDX files."""

from .dataset import ArrayImages as ArrayImages
from .dataset import DataError as DataError
from .dataset import ImageDataset as ImageDataset
from .dataset import split as split
from .folder import FolderImages as FolderImages
from .hub import HubImages as HubImages
from .identity import Identity as Identity
from .identity import identify as identify
from .photos import PhotoCrops as PhotoCrops
from .sources import absolute_source as absolute_source
from .sources import load as load
