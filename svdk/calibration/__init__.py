"""From a base model, an adapter and labelled data to a calibrated :class:`svdk.Steering`.

Reading order: ``sweep`` (both models once over the data), ``kept_statistics`` (what is kept of it),
``loss_views`` (the loss along mu), ``estimators`` (the strength, and what it gains out of fold),
``positions`` (one strength an output position), ``levers`` (which of them to use), ``report``,
``calibrate``, ``artifact`` (the result, saved beside the adapter), ``static_vector``, ``plot``.
"""

from svdk.calibration.calibrate import calibrate, recalibrate
from svdk.calibration.report import Report

__all__ = ["Report", "calibrate", "recalibrate"]
