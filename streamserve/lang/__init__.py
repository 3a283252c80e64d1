"""Programs that talk to a model: SGLang's frontend language (Zheng et al. 2023, arXiv 2312.07104), with coroutines underneath."""
