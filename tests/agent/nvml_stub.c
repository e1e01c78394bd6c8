/* Stands for libnvidia-ml.so.1 with one GPU, at 0000:01:00.0: the functions that the agent calls,
 * as nvml.h declares them (API version 13). What the GPU says is in the stub_ variables. With OLD it
 * is a library of a driver from before NVML 12.2, which has "ThrottleReasons" for "EventReasons". */
#include <string.h>

typedef struct nvmlDevice_st *nvmlDevice_t;
typedef enum { NVML_SUCCESS, NVML_ERROR_UNINITIALIZED, NVML_ERROR_INVALID_ARGUMENT,
               NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND = 6,
               NVML_ERROR_DRIVER_NOT_LOADED = 9 } nvmlReturn_t;
typedef enum { NVML_CLOCK_GRAPHICS, NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_CLOCK_VIDEO } nvmlClockType_t;
typedef enum { NVML_TEMPERATURE_GPU } nvmlTemperatureSensors_t;

int stub_users;
int stub_driver = 1;
int stub_tells_power = 1;
unsigned int stub_clocks[4] = {1, 2505, 10501, 4};
unsigned int stub_celsius = 61;
unsigned int stub_milliwatts = 72000;
unsigned long long stub_reasons;

/* A handle with bits above the lowest 32: one that was cut is another. */
static nvmlDevice_t const GPU = (nvmlDevice_t)0x7f00123456789ab0;

nvmlReturn_t nvmlInit_v2(void) {
    if (!stub_driver) return NVML_ERROR_DRIVER_NOT_LOADED;
    stub_users++;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlShutdown(void) {
    if (!stub_users) return NVML_ERROR_UNINITIALIZED;
    stub_users--;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *pciBusId, nvmlDevice_t *device) {
    if (strcmp(pciBusId, "0000:01:00.0")) return NVML_ERROR_NOT_FOUND;
    *device = GPU;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock) {
    if (device != GPU) return NVML_ERROR_INVALID_ARGUMENT;
    *clock = stub_clocks[type];
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, nvmlTemperatureSensors_t sensorType,
                                      unsigned int *temp) {
    if (device != GPU || sensorType != NVML_TEMPERATURE_GPU) return NVML_ERROR_INVALID_ARGUMENT;
    *temp = stub_celsius;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int *power) {
    if (device != GPU) return NVML_ERROR_INVALID_ARGUMENT;
    if (!stub_tells_power) return NVML_ERROR_NOT_SUPPORTED;
    *power = stub_milliwatts;
    return NVML_SUCCESS;
}

#ifdef OLD
#define nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetCurrentClocksThrottleReasons
#endif
nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device,
                                                    unsigned long long *clocksEventReasons) {
    if (device != GPU) return NVML_ERROR_INVALID_ARGUMENT;
    *clocksEventReasons = stub_reasons;
    return NVML_SUCCESS;
}
