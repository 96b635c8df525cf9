"""The plugin that lets vLLM serve on bounded rows.

vLLM finds :func:`trimkv_kernels.integrations.vllm.plugin.register` through an entry point. It is
imported only there: `grid`, `options` and `rows`, which hold what is ours, work without vLLM.
"""
