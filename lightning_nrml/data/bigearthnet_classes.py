"""What BigEarthNet's files call things: label names in both nomenclatures, bands, units and their statistics.

Sources: Sumbul et al., "BigEarthNet-MM", IEEE GRSM 2021, arXiv 2105.07921 (the 19 classes); label order and
statistics as in the package bigearthnet-common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Nomenclature = Literal[19, 43]

#: the 19 classes, in the official order
CLASSES_19 = (
    "Urban fabric",
    "Industrial or commercial units",
    "Arable land",
    "Permanent crops",
    "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub",
    "Beaches, dunes, sands",
    "Inland wetlands",
    "Coastal wetlands",
    "Inland waters",
    "Marine waters",
)

#: the 43 CORINE classes (level 3) in the official order, and which of the 19 each becomes; -1 = dropped
_CORINE: dict[str, int] = {
    "Continuous urban fabric": 0,
    "Discontinuous urban fabric": 0,
    "Industrial or commercial units": 1,
    "Road and rail networks and associated land": -1,
    "Port areas": -1,
    "Airports": -1,
    "Mineral extraction sites": -1,
    "Dump sites": -1,
    "Construction sites": -1,
    "Green urban areas": -1,
    "Sport and leisure facilities": -1,
    "Non-irrigated arable land": 2,
    "Permanently irrigated land": 2,
    "Rice fields": 2,
    "Vineyards": 3,
    "Fruit trees and berry plantations": 3,
    "Olive groves": 3,
    "Pastures": 4,
    "Annual crops associated with permanent crops": 3,
    "Complex cultivation patterns": 5,
    "Land principally occupied by agriculture, with significant areas of natural vegetation": 6,
    "Agro-forestry areas": 7,
    "Broad-leaved forest": 8,
    "Coniferous forest": 9,
    "Mixed forest": 10,
    "Natural grassland": 11,
    "Moors and heathland": 12,
    "Sclerophyllous vegetation": 12,
    "Transitional woodland/shrub": 13,
    "Beaches, dunes, sands": 14,
    "Bare rock": -1,
    "Sparsely vegetated areas": 11,
    "Burnt areas": -1,
    "Inland marshes": 15,
    "Peatbogs": 15,
    "Salt marshes": 16,
    "Salines": 16,
    "Intertidal flats": -1,
    "Water courses": 17,
    "Water bodies": 17,
    "Coastal lagoons": 18,
    "Estuaries": 18,
    "Sea and ocean": 18,
}
CLASSES_43 = tuple(_CORINE)
#: ``(43,)`` int64: class of the 19 for every class of the 43; -1 = dropped
TO_19 = np.asarray(list(_CORINE.values()), dtype=np.int64)

#: Sentinel-2 bands by wavelength and the side in pixels that their files have: 10, 20 or 60 m for 1.2 km
S2_SIDES = {
    "B01": 20,
    "B02": 120,
    "B03": 120,
    "B04": 120,
    "B05": 60,
    "B06": 60,
    "B07": 60,
    "B08": 120,
    "B8A": 60,
    "B09": 20,
    "B11": 60,
    "B12": 60,
}
#: Sentinel-1 polarisations
S1_SIDES = {"VV": 120, "VH": 120}
SIDES = {**S2_SIDES, **S1_SIDES}
#: names for usual sets of bands
BAND_SETS: dict[str, tuple[str, ...]] = {
    "s2": tuple(S2_SIDES),
    "s2_10m_20m": tuple(band for band, side in S2_SIDES.items() if side > 20),
    "rgb": ("B04", "B03", "B02"),
    "s1": tuple(S1_SIDES),
    "both": tuple(SIDES),
}
#: mean and standard deviation over the archive (v1): Sentinel-2 in counts, Sentinel-1 in dB
STATISTICS = {
    "B01": (340.77, 554.81),
    "B02": (429.94, 572.42),
    "B03": (614.22, 582.88),
    "B04": (590.24, 675.89),
    "B05": (950.68, 729.90),
    "B06": (1792.46, 1096.01),
    "B07": (2075.47, 1273.45),
    "B08": (2218.95, 1365.46),
    "B8A": (2266.46, 1356.14),
    "B09": (2246.06, 1302.33),
    "B11": (1594.43, 1079.19),
    "B12": (1009.33, 818.87),
    "VV": (-12.62, 5.12),
    "VH": (-19.29, 5.46),
}


def class_names(nomenclature: Nomenclature) -> list[str]:
    """Names of the 19 or 43 classes in label order."""
    return list(CLASSES_19 if nomenclature == 19 else CLASSES_43)


def class_ids(names: Sequence[str], nomenclature: Nomenclature, source: Nomenclature) -> np.ndarray:
    """Label column of every name.

    Args:
        names: names of the nomenclature ``source``.
        nomenclature: 19 or 43, the columns that are wanted.
        source: 43 for v1's files, 19 for v2's. 19 names cannot become 43 classes.

    Returns:
        ``(len(names),)`` int64; -1 = dropped in going from 43 to 19 classes, -2 = a name that is not known.
    """
    known = {name: i for i, name in enumerate(class_names(source))}
    found = np.asarray([known.get(name, -2) for name in names], dtype=np.int64)
    if source == nomenclature:
        return found
    return np.where(found >= 0, TO_19[np.maximum(found, 0)], found)


def bands_of(bands: str | Sequence[str]) -> tuple[str, ...]:
    """Band names of a set such as ``"s2"``, or the names themselves after a check.

    Raises:
        ValueError: an unknown set or band, a band named twice, or none.
    """
    if isinstance(bands, str):
        if bands not in BAND_SETS:
            raise ValueError(
                f"bands '{bands}' is no set of bands: use {', '.join(BAND_SETS)}, or a list such as [B04, VV]"
            )
        return BAND_SETS[bands]
    unknown = [band for band in bands if band not in SIDES]
    if unknown:
        raise ValueError(f"there is no band '{unknown[0]}' in BigEarthNet; its bands are {', '.join(SIDES)}")
    if not bands or len(set(bands)) != len(bands):
        raise ValueError(f"bands must name at least one band and none twice, got {list(bands)}")
    return tuple(bands)
