# What every command on every machine of local.yaml has in its environment.
export PATH="$HOME/lightship/.venv/bin:$PATH"
# cluster.serve's own settings of Serve; a test compares.
export RAY_SERVE_THROUGHPUT_OPTIMIZED=1
export RAY_SERVE_USE_GRPC_BY_DEFAULT=1
export RAY_SERVE_ENABLE_DIRECT_INGRESS=0
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1
export RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S=2
export RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S=2
export RAY_DEDUP_LOGS=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
# Every process of the cluster proves itself with the one token, in ~/.ray/auth_token.
export RAY_AUTH_MODE=token
# A node that hangs is noticed after 5 s; Ray's own settings take 65 s.
export RAY_health_check_initial_delay_ms=1000
export RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=1000
export RAY_health_check_failure_threshold=3
