"""What happens when: phases of training, averages, validation, pictures, files. Installed as lit_edm.callbacks."""

from lit_edm.callbacks.ema import ExponentialMovingAverage
from lit_edm.callbacks.freeze_embeddings import FreezeEmbeddings
from lit_edm.callbacks.matmul_precision import MatmulPrecision
from lit_edm.callbacks.retract_embeddings import RetractEmbeddings
from lit_edm.callbacks.sample_sheet import SampleSheet
from lit_edm.callbacks.save_adapter import SaveAdapter
from lit_edm.callbacks.save_pictures import SavePictures
from lit_edm.callbacks.train_during import TrainDuring
from lit_edm.callbacks.validation_frechet_distance import ValidationFrechetDistance
from lit_edm.callbacks.validation_images import ValidationImages
from lit_edm.callbacks.validation_loss import ValidationLoss

__all__ = [
    "ExponentialMovingAverage",
    "FreezeEmbeddings",
    "MatmulPrecision",
    "RetractEmbeddings",
    "SampleSheet",
    "SaveAdapter",
    "SavePictures",
    "TrainDuring",
    "ValidationFrechetDistance",
    "ValidationImages",
    "ValidationLoss",
]
