"""The distribution `niblick`: each top-level folder installs as `niblick.<folder>`.

No folder has an `__init__.py`: a top-level regular package named `kernels` would shadow Hugging Face's
`kernels`, which this field loads FlashAttention-3 with; a namespace portion does not.
"""

from setuptools import setup

ROOMS = ["kernels", "model", "data", "artifact", "evaluation", "bench"]

setup(
    name="niblick",
    version="0.1.0",
    description="Triton kernels and the whole main job for training a small language model against the clock",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[f"niblick.{room}" for room in ROOMS],
    package_dir={f"niblick.{room}": room for room in ROOMS},
    install_requires=["torch>=2.9", "triton>=3.5; platform_system == 'Linux'", "numpy>=1.26"],
    extras_require={
        "train": [
            "sentencepiece",
            "brotli>=1.2",
            "constriction",
            "tyro>=1.0",
            "rich",
            "safetensors",
            "huggingface-hub",
        ],
        "bench": ["pytest-benchmark", "matplotlib", "nvidia-ml-py", "liger-kernel", "cut-cross-entropy"],
        "flash": ["flash-attn-4"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "pytest-benchmark", "matplotlib"],
    },
)
