"""Where the small vision model of tests/data, its images, and all images of Fashion-MNIST are."""

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "tests" / "data" / "vim-fashion-mnist"
CALIBRATION = FOLDER / "calib_256.npz"
TEST = FOLDER / "test_2000.npz"
# Where Debian's package dataset-fashion-mnist puts the whole set.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_TEST = FASHION_MNIST / "t10k-images-idx3-ubyte.gz"
