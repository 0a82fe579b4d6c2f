"""The statistics that 8-bit engines are made from here, as in the tests of calibration."""

from ..calibration.conftest import calibration_folder, calibration_images

__all__ = ["calibration_folder", "calibration_images"]
