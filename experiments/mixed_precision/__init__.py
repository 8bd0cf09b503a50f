"""What computing in bfloat16 changes of a network that has been trained in float32."""
