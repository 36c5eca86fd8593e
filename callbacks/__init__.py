"""What happens when: phases of training, averages, validation, pictures, files. Installed as lit_edm.callbacks."""

from lit_edm.callbacks.ema import ExponentialMovingAverage
from lit_edm.callbacks.end_on_sigterm import EndOnSigterm
from lit_edm.callbacks.freeze_embeddings import FreezeEmbeddings
from lit_edm.callbacks.matmul_precision import MatmulPrecision
from lit_edm.callbacks.pace import Pace
from lit_edm.callbacks.retract_embeddings import RetractEmbeddings
from lit_edm.callbacks.run_summary import RunSummary
from lit_edm.callbacks.sample_sheet import SampleSheet
from lit_edm.callbacks.save_adapter import SaveAdapter
from lit_edm.callbacks.save_pictures import SavePictures
from lit_edm.callbacks.seamless_resume import SeamlessResume
from lit_edm.callbacks.skip_non_finite import SkipNonFinite
from lit_edm.callbacks.train_during import TrainDuring
from lit_edm.callbacks.validation_frechet_distance import ValidationFrechetDistance
from lit_edm.callbacks.validation_images import ValidationImages
from lit_edm.callbacks.validation_loss import ValidationLoss

__all__ = [
    "EndOnSigterm",
    "ExponentialMovingAverage",
    "FreezeEmbeddings",
    "MatmulPrecision",
    "Pace",
    "RetractEmbeddings",
    "RunSummary",
    "SampleSheet",
    "SaveAdapter",
    "SavePictures",
    "SeamlessResume",
    "SkipNonFinite",
    "TrainDuring",
    "ValidationFrechetDistance",
    "ValidationImages",
    "ValidationLoss",
]
