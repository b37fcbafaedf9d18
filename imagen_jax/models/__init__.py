"""Networks: functions of arrays that know nothing of diffusion."""
