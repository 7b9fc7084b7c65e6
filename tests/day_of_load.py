"""A day of a service, made the same each time: quiet nights, two peaks, weather, and rushes that come unannounced."""

import math
import random
from collections.abc import Iterator

TICK_S = 10.0
DAY_S = 86_400.0


def requests_per_second(seed: int = 1, peak: float = 20.0) -> Iterator[float]:
    """One figure for each TICK_S of the day; at most about twice `peak`."""
    generator = random.Random(seed)
    weather, rush = 0.0, 0.0
    for tick in range(int(DAY_S / TICK_S)):
        hour = tick * TICK_S / 3600
        season = 0.08 + 0.9 * math.exp(-((hour - 11) ** 2) / 8) + 0.7 * math.exp(-((hour - 20) ** 2) / 5)
        weather = 0.98 * weather + generator.gauss(0, 0.02)
        if generator.random() < 1 / 1500:
            rush = 0.6
        rush *= 0.99
        yield peak * max(0.0, (season + rush) * (1 + weather) * generator.uniform(0.8, 1.2))
