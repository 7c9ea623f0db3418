/* A stand-in for the NVIDIA driver's library: the functions of NVML that lbw_rl.device calls through pynvml.

   Each call is answered from the file named by NVML_SCRIPT, read anew, so that answers can change in mid-run:

       value FUNCTION DEVICE TEXT       the answer
       error FUNCTION DEVICE CODE       fails with this nvmlReturn_t
       delay FUNCTION DEVICE SECONDS    hangs first

   DEVICE is an index, FUNCTION is without its version suffix; "*" is any. A reading without a value is not supported;
   without a script there is no driver. Each call's name is appended to the file named by NVML_CALLS. Compiled with
   -DOLD_DRIVER, the library lacks what later drivers added; with -DNEW_DRIVER, what NVML has deprecated. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };
enum { DEVICES = 16, TEXT = 96, DRIVER = -1 };

typedef struct { int index; } Device;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version, sensor; int degrees; } Temperature;

static Device devices[DEVICES];
static int initialized; /* a count, as NVML keeps it */

/* Answers one call; `text` is NULL where success needs no value. */
static int answer(const char *function, int device, char *text) {
    const char *calls = getenv("NVML_CALLS"), *path = getenv("NVML_SCRIPT");
    FILE *log = calls ? fopen(calls, "a") : NULL;
    if (log) {
        fprintf(log, "%s\n", function);
        fclose(log);
    }
    FILE *script = path ? fopen(path, "r") : NULL;
    if (!script) return DRIVER_NOT_LOADED;
    int code = text ? NOT_SUPPORTED : SUCCESS, failure = SUCCESS, delay = 0;
    char line[256], kind[16], name[TEXT], whose[16], value[TEXT];
    while (fgets(line, sizeof line, script)) {
        if (sscanf(line, "%15s %95s %15s %95[^\n]", kind, name, whose, value) != 4) continue;
        if (strcmp(name, "*") && strcmp(name, function)) continue;
        if (strcmp(whose, "*") && atoi(whose) != device) continue;
        if (!strcmp(kind, "error")) failure = atoi(value);
        if (!strcmp(kind, "delay")) delay = atoi(value);
        if (!strcmp(kind, "value") && text) {
            strcpy(text, value);
            code = SUCCESS;
        }
    }
    fclose(script);
    if (delay) sleep(delay);
    return failure ? failure : code;
}

static int text_of(const char *function, Device *device, char *text) {
    if (!initialized) return UNINITIALIZED;
    return device ? answer(function, device->index, text) : INVALID_ARGUMENT;
}

static int number_of(const char *function, Device *device, unsigned *number) {
    char text[TEXT];
    int code = text_of(function, device, text);
    if (code == SUCCESS) *number = strtoul(text, NULL, 0);
    return code;
}

int nvmlInitWithFlags(unsigned flags) {
    int code = answer("nvmlInit", DRIVER, NULL);
    if (code == SUCCESS) initialized++;
    return flags ? INVALID_ARGUMENT : code;
}

int nvmlShutdown(void) {
    if (!initialized) return UNINITIALIZED;
    initialized--;
    return answer("nvmlShutdown", DRIVER, NULL);
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    char text[TEXT];
    if (!initialized) return UNINITIALIZED;
    int code = answer("nvmlDeviceGetCount", DRIVER, text);
    if (code == SUCCESS) *count = atoi(text);
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    if (!initialized) return UNINITIALIZED;
    if (index >= DEVICES) return INVALID_ARGUMENT;
    devices[index].index = index;
    *device = &devices[index];
    return answer("nvmlDeviceGetHandleByIndex", index, NULL);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    unsigned count;
    char text[TEXT];
    int code = nvmlDeviceGetCount_v2(&count);
    for (unsigned i = 0; code == SUCCESS && i < count; i++)
        if (answer("nvmlDeviceGetUUID", i, text) == SUCCESS && !strcmp(text, uuid))
            return nvmlDeviceGetHandleByIndex_v2(i, device);
    return code == SUCCESS ? NOT_FOUND : code;
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned length) {
    return length < TEXT ? INVALID_ARGUMENT : text_of("nvmlDeviceGetUUID", device, uuid);
}

int nvmlDeviceGetName(Device *device, char *name, unsigned length) {
    return length < TEXT ? INVALID_ARGUMENT : text_of("nvmlDeviceGetName", device, name);
}

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
    rates->memory = 0;
    return number_of("nvmlDeviceGetUtilizationRates", device, &rates->gpu);
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) { /* "USED TOTAL", bytes */
    char text[TEXT];
    int code = text_of("nvmlDeviceGetMemoryInfo", device, text);
    if (code == SUCCESS && sscanf(text, "%llu %llu", &memory->used, &memory->total) == 2)
        memory->free = memory->total - memory->used;
    return code;
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned *milliwatts) {
    return number_of("nvmlDeviceGetPowerUsage", device, milliwatts);
}

int nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned *milliwatts) {
    return number_of("nvmlDeviceGetEnforcedPowerLimit", device, milliwatts);
}

int nvmlDeviceGetClockInfo(Device *device, unsigned clock, unsigned *megahertz) {
    return clock == 1 ? number_of("nvmlDeviceGetClockInfo", device, megahertz) : INVALID_ARGUMENT; /* 1: the SMs */
}

int nvmlDeviceGetMaxClockInfo(Device *device, unsigned clock, unsigned *megahertz) {
    return clock == 1 ? number_of("nvmlDeviceGetMaxClockInfo", device, megahertz) : INVALID_ARGUMENT;
}

#ifndef NEW_DRIVER
int nvmlDeviceGetTemperature(Device *device, unsigned sensor, unsigned *degrees) {
    return sensor ? INVALID_ARGUMENT : number_of("nvmlDeviceGetTemperature", device, degrees);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *reasons) {
    unsigned number = 0;
    int code = number_of("nvmlDeviceGetCurrentClocksThrottleReasons", device, &number);
    *reasons = number;
    return code;
}
#endif

#ifndef OLD_DRIVER
int nvmlDeviceGetTemperatureV(Device *device, Temperature *temperature) {
    if (temperature->version != (sizeof *temperature | 1 << 24) || temperature->sensor) return INVALID_ARGUMENT;
    return number_of("nvmlDeviceGetTemperature", device, (unsigned *)&temperature->degrees);
}

int nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *reasons) {
    unsigned number = 0;
    int code = number_of("nvmlDeviceGetCurrentClocksThrottleReasons", device, &number);
    *reasons = number;
    return code;
}
#endif
