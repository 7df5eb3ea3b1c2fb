"""Packaging of fastanchor.

`kernels/` lies beside the engine so that it can be read and used alone; it is installed as
`fastanchor.kernels`.
"""

from pathlib import Path

from setuptools import find_packages, setup

VISION = ["torchvision>=0.25"]
EVAL = ["pyautoattack==0.2.0"]
PLOTS = ["matplotlib>=3.8,<4"]
TENSORBOARD = ["tensorboard>=2.16,<3"]
# The plain name `nvidia-dali` on the package index is not NVIDIA's: the extras name the CUDA builds.
DALI_CUDA12 = ["nvidia-dali-cuda120>=2.4,<3"]
DALI_CUDA13 = ["nvidia-dali-cuda130>=2.4,<3"]
# What bench/ compares with; none of them is needed. torchattacks, which pins an old `requests` and draws torchvision in, is
# installed by hand: pip install --no-deps torchattacks==3.5.1.
PEERS = [
    "pytorch-metric-learning>=2.5,<3",
    "memeff>=0.3.1,<0.4; platform_system == 'Linux'",
    "inf-cl>=1.2,<2; platform_system == 'Linux'",
    "tqdm>=4.60,<5",
]
DEV = [
    *EVAL,
    *PLOTS,
    *TENSORBOARD,
    "pytest>=8,<10",
    "pytest-benchmark>=5,<6",
    "pytest-xdist>=3.5,<4",
    "hypothesis>=6.100,<7",
    "ruff>=0.9,<1",
    # The documented form of what bench/ writes.
    "jsonschema>=4.20,<5",
    "pytorch-metric-learning>=2.5,<3",
    # The kernels' tests: Triton's interpreter and compiler need no GPU.
    "triton==3.7.1; platform_system == 'Linux'",
    "scipy>=1.10",
    # Its CPU pipelines need no GPU; this build is half the size of the other.
    "nvidia-dali-cuda130>=2.4,<3; platform_system == 'Linux' and platform_machine == 'x86_64'",
    # Models that are not ours, and optimisers to compare with.
    "timm>=1.0,<2",
]

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "fastanchor" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

setup(
    name="fastanchor",
    version=version,
    description="The engine for training and judging adversarially robust image classifiers, built for speed",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastanchor", "fastanchor.*"]), "fastanchor.kernels"],
    package_dir={"fastanchor.kernels": "kernels"},
    package_data={"fastanchor": ["recipes/*.yaml", "recipes/plans/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pyyaml>=6,<7",
        "tyro>=1.0,<2",
        "rich>=13,<16",
        "pillow>=10",
        # The embedded data set (handwritten digits) and the embedding map of the report.
        "scikit-learn>=1.4,<2",
    ],
    extras_require={
        "dev": DEV,
        "dali": DALI_CUDA12,
        "dali-cuda13": DALI_CUDA13,
        "vision": VISION,
        "eval": EVAL,
        "plots": PLOTS,
        "tensorboard": TENSORBOARD,
        "peers": PEERS,
    },
    entry_points={"console_scripts": ["fastanchor = fastanchor.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
