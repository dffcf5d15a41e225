"Polygons: exact where nothing may be lost, within the bound elsewhere, for masks of any shape."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from scipy.ndimage import gaussian_filter, label

from u2seg.polygons import joined, mask_window, polygon_mask, polygons, rings
