/* A stand-in for libnvidia-ml.so.1, for tests on machines without GPUs: what pynvml calls, answered from a text file.
 *
 * The file, named by SELECTN_NVML_STANDIN, is read again at every call, so a test changes the hardware by replacing it.
 * One statement a line; <gpu> is an index or *, <function> a name without its _v2 or *:
 *
 *   gpus <number>
 *   value <gpu> <name> <number>         what a counter answers; the last matching line counts
 *   error <gpu> <function> <code>       the call fails with an NVML_ERROR_*
 *   hang <gpu> <function>               the call returns when this line is gone from the file
 *   crash <gpu> <function>              the call takes its process with it, as a driver's defect does
 *   lost <gpu>                          NVML_ERROR_GPU_IS_LOST, but for link and throughput calls on a handle already had
 *   level <gpu> <gpu> <number>          NVML_TOPOLOGY_* of a pair; without it NVML_TOPOLOGY_SYSTEM
 *   xid <gpu> <code>                    an Xid event; each such line happens once
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, TIMEOUT = 10, GPU_IS_LOST = 15 };
enum { MAX_GPUS = 64, LEVEL_SYSTEM = 50, EVENT_XID = 8, NODE = -1 };
#define IDLE_NS 10000000

typedef struct Device { int index; } *Device;
typedef struct EventSet { int registered[MAX_GPUS]; } *EventSet;
typedef struct { char legacy[16]; unsigned domain, bus, device, device_id, subsystem_id; char bus_id[32]; } PciInfo;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned version, sensor; int temperature; } Temperature;
typedef struct { Device device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } EventData;

static struct Device devices[MAX_GPUS];
static int delivered_xids[MAX_GPUS];

typedef struct { char verb[16], a[16], b[64], c[32]; } Statement;

static FILE *machine(void) {
    const char *path = getenv("SELECTN_NVML_STANDIN");
    return path ? fopen(path, "r") : NULL;
}

static int next(FILE *file, Statement *s) {
    char line[256];
    while (file && fgets(line, sizeof line, file)) {
        memset(s, 0, sizeof *s);
        if (sscanf(line, "%15s %15s %63s %31s", s->verb, s->a, s->b, s->c) >= 2) return 1;
    }
    if (file) fclose(file);
    return 0;
}

static int names_gpu(const char *text, int gpu) {
    return !strcmp(text, "*") || (gpu != NODE && atoi(text) == gpu && text[0] != '*');
}

static int names_call(const char *text, const char *function) { return !strcmp(text, "*") || !strcmp(text, function); }

/* What a call to `function` of `gpu` fails with, after it has hung for as long as the file says so. */
static int outcome(int gpu, const char *function, int answers_when_lost) {
    for (;;) {
        int code = SUCCESS, hangs = 0;
        Statement s;
        for (FILE *file = machine(); next(file, &s);) {
            if (!strcmp(s.verb, "error") && names_gpu(s.a, gpu) && names_call(s.b, function)) code = atoi(s.c);
            if (!strcmp(s.verb, "hang") && names_gpu(s.a, gpu) && names_call(s.b, function)) hangs = 1;
            if (!strcmp(s.verb, "crash") && names_gpu(s.a, gpu) && names_call(s.b, function)) raise(SIGKILL);
            if (!strcmp(s.verb, "lost") && names_gpu(s.a, gpu) && !answers_when_lost) code = GPU_IS_LOST;
        }
        if (!hangs) return code;
        struct timespec idle = {0, IDLE_NS};
        nanosleep(&idle, NULL);
    }
}

static unsigned long long value(int gpu, const char *name, unsigned long long otherwise) {
    Statement s;
    for (FILE *file = machine(); next(file, &s);)
        if (!strcmp(s.verb, "value") && names_gpu(s.a, gpu) && !strcmp(s.b, name)) otherwise = strtoull(s.c, NULL, 10);
    return otherwise;
}

static unsigned num_gpus(void) {
    Statement s;
    unsigned number = 2;
    for (FILE *file = machine(); next(file, &s);)
        if (!strcmp(s.verb, "gpus")) number = (unsigned)atoi(s.a);
    return number;
}

#define FAIL_AS_TOLD(gpu, function, answers_when_lost) \
    do { int code_ = outcome(gpu, function, answers_when_lost); if (code_) return code_; } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; return outcome(NODE, "nvmlInit", 0); }
int nvmlShutdown(void) { return outcome(NODE, "nvmlShutdown", 0); }
const char *nvmlErrorString(int code) { (void)code; return "an error that the bindings do not know"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    FAIL_AS_TOLD(NODE, "nvmlSystemGetDriverVersion", 0);
    snprintf(text, size, "stand-in");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    FAIL_AS_TOLD(NODE, "nvmlDeviceGetCount", 0);
    *count = num_gpus();
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *device) {
    if (index >= num_gpus() || index >= MAX_GPUS) return INVALID_ARGUMENT;
    FAIL_AS_TOLD((int)index, "nvmlDeviceGetHandleByIndex", 0);
    devices[index].index = (int)index;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetName(Device device, char *text, unsigned size) {
    FAIL_AS_TOLD(device->index, "nvmlDeviceGetName", 0);
    snprintf(text, size, "Stand-in GPU");
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device device, char *text, unsigned size) {
    FAIL_AS_TOLD(device->index, "nvmlDeviceGetUUID", 0);
    snprintf(text, size, "GPU-stand-in-%d", device->index);
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(Device device, PciInfo *info) {
    FAIL_AS_TOLD(device->index, "nvmlDeviceGetPciInfo", 0);
    memset(info, 0, sizeof *info);
    info->bus = 16u + (unsigned)device->index;
    snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", info->bus);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device device, Memory *memory) {
    FAIL_AS_TOLD(device->index, "nvmlDeviceGetMemoryInfo", 0);
    memory->total = value(device->index, "memory_total", 24ull << 30);
    memory->used = value(device->index, "memory_used", 1ull << 30);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(Device device, Utilization *rates) {
    FAIL_AS_TOLD(device->index, "nvmlDeviceGetUtilizationRates", 0);
    rates->gpu = (unsigned)value(device->index, "compute_percent", 40);
    rates->memory = (unsigned)value(device->index, "memory_percent", 20);
    return SUCCESS;
}

#define COUNTER(function, type, name, otherwise, answers_when_lost) \
    int function(Device device, type *answer) { \
        FAIL_AS_TOLD(device->index, #function, answers_when_lost); \
        *answer = (type)value(device->index, name, otherwise); \
        return SUCCESS; \
    }

COUNTER(nvmlDeviceGetCurrPcieLinkGeneration, unsigned, "pcie_generation", 1, 1)
COUNTER(nvmlDeviceGetMaxPcieLinkGeneration, unsigned, "pcie_max_generation", 4, 1)
COUNTER(nvmlDeviceGetCurrPcieLinkWidth, unsigned, "pcie_width", 16, 1)
COUNTER(nvmlDeviceGetMaxPcieLinkWidth, unsigned, "pcie_max_width", 16, 1)
COUNTER(nvmlDeviceGetPcieReplayCounter, unsigned, "pcie_replays", 0, 0)
COUNTER(nvmlDeviceGetPowerUsage, unsigned, "power_mw", 65500, 0)
COUNTER(nvmlDeviceGetEnforcedPowerLimit, unsigned, "power_limit_mw", 150000, 0)
COUNTER(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, "throttle_bits", 1, 0)
COUNTER(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, "throttle_bits", 1, 0)

int nvmlDeviceGetPcieThroughput(Device device, unsigned counter, unsigned *kb_per_s) {
    FAIL_AS_TOLD(device->index, "nvmlDeviceGetPcieThroughput", 1);
    *kb_per_s = (unsigned)value(device->index, counter == 1 ? "rx_kb_per_s" : "tx_kb_per_s", counter == 1 ? 2000 : 30);
    return SUCCESS;
}

int nvmlDeviceGetTemperature(Device device, unsigned sensor, unsigned *celsius) {
    (void)sensor;
    FAIL_AS_TOLD(device->index, "nvmlDeviceGetTemperature", 0);
    *celsius = (unsigned)value(device->index, "temperature_c", 51);
    return SUCCESS;
}

int nvmlDeviceGetTemperatureV(Device device, Temperature *reading) {
    FAIL_AS_TOLD(device->index, "nvmlDeviceGetTemperatureV", 0);
    reading->temperature = (int)value(device->index, "temperature_c", 51);
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(Device device, unsigned kind, unsigned counter, unsigned long long *count) {
    (void)counter;
    FAIL_AS_TOLD(device->index, "nvmlDeviceGetTotalEccErrors", 0);
    *count = value(device->index, kind == 1 ? "ecc_uncorrected" : "ecc_corrected", 0);
    return SUCCESS;
}

int nvmlDeviceGetTopologyCommonAncestor(Device one, Device other, unsigned *level) {
    FAIL_AS_TOLD(one->index, "nvmlDeviceGetTopologyCommonAncestor", 0);
    FAIL_AS_TOLD(other->index, "nvmlDeviceGetTopologyCommonAncestor", 0);
    Statement s;
    *level = LEVEL_SYSTEM;
    for (FILE *file = machine(); next(file, &s);) {
        int a = atoi(s.a), b = atoi(s.b);
        int is_pair = (a == one->index && b == other->index) || (b == one->index && a == other->index);
        if (!strcmp(s.verb, "level") && is_pair) *level = (unsigned)atoi(s.c);
    }
    return SUCCESS;
}

int nvmlEventSetCreate(EventSet *events) {
    FAIL_AS_TOLD(NODE, "nvmlEventSetCreate", 0);
    *events = calloc(1, sizeof **events);
    return SUCCESS;
}

int nvmlEventSetFree(EventSet events) { free(events); return SUCCESS; }

int nvmlDeviceRegisterEvents(Device device, unsigned long long types, EventSet events) {
    FAIL_AS_TOLD(device->index, "nvmlDeviceRegisterEvents", 0);
    events->registered[device->index] = (types & EVENT_XID) != 0;
    return SUCCESS;
}

int nvmlEventSetWait_v2(EventSet events, EventData *data, unsigned timeout_ms) {
    (void)timeout_ms;
    FAIL_AS_TOLD(NODE, "nvmlEventSetWait", 0);
    int seen[MAX_GPUS] = {0}, found = 0;
    Statement s;
    for (FILE *file = machine(); next(file, &s);) {
        int gpu = atoi(s.a);
        if (strcmp(s.verb, "xid") || gpu < 0 || gpu >= MAX_GPUS || !events->registered[gpu]) continue;
        if (found || seen[gpu]++ < delivered_xids[gpu]) continue;
        delivered_xids[gpu]++;
        memset(data, 0, sizeof *data);
        data->device = &devices[gpu];
        data->type = EVENT_XID;
        data->data = strtoull(s.b, NULL, 10);
        found = 1;
    }
    return found ? SUCCESS : TIMEOUT;
}
