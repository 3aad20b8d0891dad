"""PyTorch for Python and what it imports: one hash where a wheel fits every Python, else those for 3.10 to 3.13."""

_HASHES = {
    "filelock==3.18.0": [
        "c401f4f8377c4464e6db25fff06205fd89bdd83b65eb0488ed1b160f780e21de",
    ],
    "fsspec==2025.5.1": [
        "24d3a2e663d5fc735ab256263c4075f374a174c3410c0b25e5bd1970bceaa462",
    ],
    "jinja2==3.1.6": [
        "85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67",
    ],
    "markupsafe==3.0.2": [
        "bbcb445fa71794da8f178f0f6d66789a28d7319071af7a496d4d507ed566270d",
        "a123e330ef0853c6e822384873bef7507557d8e4a082961e1defa947aa59ba84",
        "e17c96c14e19278594aa4841ec148115f9c7615a47382ecb6b82bd8fea3ab0c8",
        "15ab75ef81add55874e7ab7055e9c397312385bd9ced94920f2802310c930396",
    ],
    "mpmath==1.3.0": [
        "a0b2b9fe80bbcd81a6647ff13108738cfb482d481d826cc0e02f5b35e5c88d2c",
    ],
    "networkx==3.4.2": [
        "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
    ],
    "numpy==2.2.6": [
        "fc7b73d02efb0e18c000e9ad8b83480dfcd5dfd11065997ed4c6747470ae8915",
        "ba10f8411898fc418a521833e014a77d3ca01c15b0c6cdcce6a0d2897e6dbbdf",
        "fd83c01228a688733f1ded5201c678f0c53ecc1006ffbc404db9f7a899ac6249",
        "1bc23a79bfabc5d056d106f9befb8d50c31ced2fbc70eedb8155aec74a45798f",
    ],
    "safetensors==0.5.3": [
        "cead1fa41fc54b1e61089fa57452e8834f798cb1dc7a09ba3524f1eb08e0317a",
    ],
    "sympy==1.14.0": [
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    ],
    "torch==2.11.0": [
        "1b32ceda909818a03b112006709b02be1877240c31750a8d9c6b7bf5f2d8a6e5",
        "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
        "0f68f4ac6d95d12e896c3b7a912b5871619542ec54d3649cf48cc1edd4dd2756",
        "cc89b9b173d9adfab59fd227f0ab5e5516d9a52b658ae41d64e59d2e55a418db",
    ],
    "typing_extensions==4.13.2": [
        "a439e7c04b49fec3e5d3e2beaa21755cadbbdc391694e28ccdd36ca4a1408f8c",
    ],
}

REQUIREMENTS = [
    " ".join([package] + ["--hash=sha256:" + digest for digest in digests])
    for package, digests in _HASHES.items()
]
