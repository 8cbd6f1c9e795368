"""What our code takes for granted of vLLM and no line of it names: read again when its source changed. By hand, each with why.

A place is ``module:name`` or ``module:Class.member``, where it is defined.
"""

from __future__ import annotations

_CONNECTOR = "the order of a step's calls of the connector, on which reports and grants stand"
_ADMISSION = "how many tokens the manager is asked for, and when; preemption calls nothing else of it"
_WAITS = "a connector that does not know yet how much it holds (None) is asked again in the next step, in the request's place"
_FAILURE = "requests of reported block ids end with an error and give their blocks back once"
_REPEATED = "models/native.py or models/sparse.py repeats it"
_READ = "read where the type is not known to the checker"

ASSUMED: dict[str, str] = {
    # Scheduler
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": f"{_ADMISSION}; {_WAITS}",
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": "blocks of a prompt are hashed before the connector hears of it",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": _CONNECTOR,
    "vllm.v1.core.sched.scheduler:Scheduler._build_kv_connector_meta": _CONNECTOR,
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": _ADMISSION,
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": "when a request's blocks go back, and who asks for its summary",
    "vllm.v1.core.sched.scheduler:Scheduler._free_request_blocks": "blocks of a request that ended are free at once",
    "vllm.v1.core.sched.scheduler:Scheduler._connector_finished": "the summary that rides on the response",
    "vllm.v1.core.sched.scheduler:Scheduler._update_requests_with_invalid_blocks": _FAILURE,
    "vllm.v1.core.sched.scheduler:Scheduler._handle_invalid_blocks": _FAILURE,
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": _ADMISSION,
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.get_num_blocks_to_allocate": _ADMISSION,
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.allocate_new_blocks": _ADMISSION,
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.free": "null blocks are skipped when freed",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.free": "null blocks are skipped when freed",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.remove_skipped_blocks": "takes nothing of a full lane",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks": "nothing where blocks are not hashed",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "a block given back may be granted in the same step",
    "vllm.v1.core.block_pool:BlockPool.get_usage": _READ,
    "vllm.v1.core.block_pool:BlockPool.num_gpu_blocks": _READ,
    # Planning of the cache
    "vllm.v1.core.kv_cache_utils:get_kv_cache_groups": "gated layers form one group",
    "vllm.v1.core.kv_cache_utils:get_kv_cache_config_from_groups": "all layers lie in one storage, layer outermost",
    "vllm.v1.core.kv_cache_utils:get_kv_cache_configs": "the bytes of a request decide what fits",
    "vllm.v1.core.kv_cache_utils:validate_kv_cache_layout": "the backend's layout is honoured",
    "vllm.v1.kv_cache_interface:KVCacheTensor": "cache/lanes.py reaches every page by its strides",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered": "fills itself only while it is empty",
    # Worker
    "vllm.v1.worker.kv_connector_model_runner_mixin:KVConnectorModelRunnerMixin._get_kv_connector_output": _CONNECTOR,
    "vllm.v1.worker.kv_connector_model_runner_mixin:KVConnectorModelRunnerMixin.kv_connector_no_forward": _CONNECTOR,
    "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.pre_forward": _CONNECTOR,
    "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.post_forward": _CONNECTOR,
    "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.no_forward": _CONNECTOR,
    "vllm.distributed.kv_transfer.kv_connector.utils:KVOutputAggregator.aggregate": "a rank that says nothing is skipped",
    "vllm._custom_ops:cpu_attention_with_kv_cache": "names of arguments and the op; K page [D, N], V page [N, D] in isa vec",
    "vllm._custom_ops:cpu_attn_get_scheduler_metadata": "names of arguments and the op",
    "vllm.model_executor.layers.attention.attention:get_attention_context": "the layer's metadata is that of the step",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.CPU_ATTN": "our backend's name on CPU",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.CUSTOM": "our backend's name on a GPU",
    "vllm.v1.kv_cache_interface:create_kv_cache_views": "shape and strides of what the connector is handed",
    # Models
    "vllm.model_executor.models.llama:LlamaMLP.forward": _REPEATED,
    "vllm.model_executor.models.llama:LlamaMLP.gate_up_proj": _READ,
    "vllm.model_executor.models.llama:LlamaMLP.down_proj": _READ,
    "vllm.model_executor.models.llama:LlamaMLP.act_fn": _READ,
    "vllm.model_executor.models.llama:LlamaAttention.num_heads": _READ,
    "vllm.model_executor.models.llama:LlamaAttention.num_kv_heads": _READ,
    "vllm.model_executor.models.llama:LlamaAttention.head_dim": _READ,
    "vllm.model_executor.models.llama:LlamaAttention.scaling": _READ,
    "vllm.model_executor.models.qwen2:Qwen2MLP.forward": _REPEATED,
    "vllm.model_executor.models.qwen2:Qwen2MLP.gate_up_proj": _READ,
    "vllm.model_executor.models.qwen2:Qwen2MLP.down_proj": _READ,
    "vllm.model_executor.models.qwen2:Qwen2MLP.act_fn": _READ,
    "vllm.model_executor.models.qwen3:Qwen3Attention.num_heads": _READ,
    "vllm.model_executor.models.qwen3:Qwen3Attention.num_kv_heads": _READ,
    "vllm.model_executor.models.qwen3:Qwen3Attention.scaling": _READ,
    # Front end
    "vllm.config.vllm:VllmConfig.try_verify_and_update_config": "the hook runs before the connector is looked at",
    "vllm.config.model:ModelConfig.is_multimodal_model": "a gated class is never multimodal itself",
    "vllm.v1.sample.logits_processor:validate_logits_processors_parameters": "each request is asked about in the front end",
    "vllm.v1.sample.logits_processor:build_logitsprocs": "names are looked up by getattr",
    "vllm.plugins:load_general_plugins": "register() in every process that builds a scheduler or a model",
    "vllm.plugins:load_endpoint_plugins": "only where VLLM_PLUGINS names the plugin",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.attach_router": "endpoint.py implements it",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state": "endpoint.py implements it",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.required_tasks": "endpoint.py implements it",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.name": "endpoint.py implements it",
}
