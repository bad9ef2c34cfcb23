"""Dense optical flow between the frames of a clip, by OpenCV (the extra `flow`).

`dis` is Dense Inverse Search (Kroeger, Timofte, Dai, Van Gool, ECCV 2016), which is fast and sharp at the
edges of what moves; `farneback` fits polynomials (Farneback, SCIA 2003) and is smoother. TV-L1, which many
papers use, is only in OpenCV's contrib package, which cannot be installed beside the plain one.

Axis letters: T frames, H height, W width, C colours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from moviola.types import MissingExtra, UsageError

Method = Literal["dis", "farneback"]
_SMALLEST = 16


def optical_flow(frames_THWC: np.ndarray, method: Method = "dis") -> np.ndarray:
    """flow_T2HW, float32, of uint8 RGB frames: T - 1 maps, each from a frame to the next.

    Channel 0 is how many pixels what is seen at a place moves to the right, channel 1 how many down. Frames
    that are equal have a flow of zero. Raises `MissingExtra` without OpenCV, `UsageError` for other arrays.
    """
    if method not in get_args(Method):
        raise UsageError(f"Optical flow is computed by {' or '.join(get_args(Method))}, got {method!r}.")
    shape = frames_THWC.shape
    if frames_THWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UsageError(f"Frames must be uint8 RGB (T, H, W, 3), got {frames_THWC.dtype} of shape {shape}.")
    if shape[0] < 2 or min(shape[1:3]) < _SMALLEST:
        raise UsageError(
            f"Optical flow needs two frames or more of {_SMALLEST} x {_SMALLEST} pixels or more, got {shape}."
        )
    calculate, grey = _opencv(method)
    grey_THW = [grey(np.ascontiguousarray(frame)) for frame in frames_THWC]
    flow_T2HW = np.zeros((shape[0] - 1, 2, *shape[1:3]), np.float32)
    for made_2HW, first, second in zip(flow_T2HW, grey_THW, grey_THW[1:]):
        if not np.array_equal(first, second):
            made_2HW[:] = calculate(first, second).transpose(2, 0, 1)
    return flow_T2HW


def _opencv(method: Method) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """flow_HW2 of two grey frames, and the grey frame of an RGB one."""
    try:
        import cv2
    except ImportError as error:
        raise MissingExtra("opencv-python-headless", "flow") from error
    cv: Any = cv2  # its type stubs leave functions out

    def grey(frame_HWC: np.ndarray) -> Any:
        return cv.cvtColor(frame_HWC, cv.COLOR_RGB2GRAY)

    if method == "dis":
        finder = cv.DISOpticalFlow_create(cv.DISOPTICAL_FLOW_PRESET_MEDIUM)  # it keeps buffers: one a call
        return lambda first, second: finder.calc(first, second, None), grey

    def farneback(first: Any, second: Any) -> Any:
        return cv.calcOpticalFlowFarneback(
            first,
            second,
            None,
            pyr_scale=0.5,
            levels=3,
            winsize=15,
            iterations=3,
            poly_n=5,
            poly_sigma=1.2,
            flags=0,
        )

    return farneback, grey
