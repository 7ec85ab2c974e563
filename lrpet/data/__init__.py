"""Images on the device, or streamed from the disk."""

from lrpet.data.batches import Batches
from lrpet.data.cache import DataError
from lrpet.data.digits_tree import make_digits_tree
from lrpet.data.load import fits_in_memory, load_images, make_batches
from lrpet.data.pixels import central_square, open_image
from lrpet.data.sets import ImageData, load_data
from lrpet.data.stream import StreamBatches, StreamData, worker_count
from lrpet.data.tree import list_images

__all__ = [
    "Batches",
    "DataError",
    "ImageData",
    "StreamBatches",
    "StreamData",
    "central_square",
    "fits_in_memory",
    "list_images",
    "load_data",
    "load_images",
    "make_batches",
    "make_digits_tree",
    "open_image",
    "worker_count",
]
