"""Package metadata, dependencies and extras. Tool settings: pyproject.toml; versions that CI runs: constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

BASE = [
    "megatron-core~=0.16.1",
    "numpy",
    "psutil",
    "pyyaml",
    "rich",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "torch>=2.6",
]

EXTRAS = {
    "test": ["pytest>=8", "hypothesis"],
    "dev": ["matplotlib", "mypy", "ruff"],
    "data": ["gigatoken", "pyarrow", "sentencepiece", "tiktoken", "zstandard"],
    "hf": ["transformers>=5"],
    "lora": ["peft"],
    "quantization": ["bitsandbytes", "torchao"],
    "plots": ["matplotlib"],
    # The versions that megatron-core 0.16.1 names.
    "te": ["transformer-engine[pytorch]>=2.9.0a0,<2.12.0"],
    "wandb": ["wandb"],
}

setup(
    name="megatron-ext",
    version="0.1.0.dev0",
    description="Megatron-core, extended: per-layer embeddings, neuro-plastic transformers, progressive growth",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megatron_ext", "megatron_ext.*"]),
    package_data={"megatron_ext": ["py.typed"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
