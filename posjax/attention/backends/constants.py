"""Constants for masked pairs and empty rows in the softmax of every tiled backend, finite to avoid NaN."""

import math

LOG2E = math.log2(math.e)  # the kernels compute powers of two
MASK_VALUE = -2e38  # the score of a masked pair: its softmax weight is zero
INIT_MAX = -1e30  # initial running maximum: above MASK_VALUE, so that a row with no allowed key has zero weights
EMPTY_LSE = 1e30  # the log-sum-exp of a row with no allowed key: all its weights are zero
