"""How much the tests try, decided by the profile that the environment names.

``HYPOTHESIS_PROFILE`` names it. Without it, the profile is `ci` where ``CI`` is set, else `dev`. Every
profile runs the same test functions. The full ones try more examples, seeds, kills and stores.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
FULL = PROFILE != "dev"
"""Whether the tests try all that they can."""


def sized(small, full):
    """Return what the profile asks for: a size, or cases for ``parametrize``."""
    return full if FULL else small


def load():
    """Register the profiles with Hypothesis, and load the one of the environment."""
    patient = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile("dev", max_examples=20, deadline=None)
    settings.register_profile(
        "ci",
        max_examples=100,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=patient,
    )
    settings.register_profile(
        "deep", max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.register_profile(  # `python -m benchmarks.mutations` wants to know that a test fails, not why
        "mutations",
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=patient,
    )
    settings.load_profile(PROFILE)
