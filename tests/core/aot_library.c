/* A library with AOTInductor's symbols, written by hand: p += row[0] * x, returns (sum(p), p's dtype as int64, sum(p)).

   inputs: p float32 (3,), row float64 (n,), x float32 (3,). It fails where x[0] is negative, and is slow where x[1] is
   above 1000: it then takes x[1] microseconds. Like the real ones it uses up the handles of its inputs, also when it
   fails, and gives one handle twice. */
#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef void* Tensor;
int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_dtype(Tensor, int32_t*);
int32_t aoti_torch_delete_tensor_object(Tensor);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*);
int32_t aoti_torch_dtype_float32(void);
int32_t aoti_torch_dtype_int64(void);
int32_t aoti_torch_device_type_cpu(void);
#ifdef FOREIGN
void no_torch_has_this(void);
#endif

static const char* error = "";

int32_t AOTInductorGetLastError(const char** text) {
  *text = error;
  return 0;
}

int32_t AOTInductorModelContainerCreateWithDevice(void** container, size_t num_models, const char* device,
                                                  const char* folder) {
  (void)num_models, (void)device, (void)folder;
#ifdef BROKEN
  error = "the constants are gone";
  return 1;
#endif
#ifdef FOREIGN
  no_torch_has_this();
#endif
  *container = &error;
  return 0;
}

int32_t AOTInductorModelContainerDelete(void* container) { return container != &error; }

int32_t AOTInductorModelContainerGetNumInputs(void* container, size_t* num) {
  (void)container;
  *num = 3;
  return 0;
}

int32_t AOTInductorModelContainerGetNumOutputs(void* container, size_t* num) {
  (void)container;
  *num = 3;
  return 0;
}

static void wait_us(float us) {
  struct timespec begin, now;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  do clock_gettime(CLOCK_MONOTONIC, &now);
  while ((now.tv_sec - begin.tv_sec) * 1e6 + (now.tv_nsec - begin.tv_nsec) * 1e-3 < us);
}

int32_t AOTInductorModelContainerRunSingleThreaded(void* container, Tensor* inputs, size_t num_inputs, Tensor* outputs,
                                                   size_t num_outputs, void* stream, void* proxy) {
  (void)container, (void)num_inputs, (void)num_outputs, (void)stream, (void)proxy;
  float *p, *x, *sum;
  double* row;
  int64_t* number;
  int32_t dtype;
  aoti_torch_get_data_ptr(inputs[0], (void**)&p);
  aoti_torch_get_data_ptr(inputs[1], (void**)&row);
  aoti_torch_get_data_ptr(inputs[2], (void**)&x);
  aoti_torch_get_dtype(inputs[0], &dtype);
  const int fails = x[0] < 0;
  if (x[1] > 1000) wait_us(x[1]);
  if (!fails) {
    const int32_t cpu = aoti_torch_device_type_cpu();
    aoti_torch_empty_strided(0, NULL, NULL, aoti_torch_dtype_float32(), cpu, 0, &outputs[0]);
    aoti_torch_empty_strided(0, NULL, NULL, aoti_torch_dtype_int64(), cpu, 0, &outputs[1]);
    outputs[2] = outputs[0];
    aoti_torch_get_data_ptr(outputs[0], (void**)&sum);
    aoti_torch_get_data_ptr(outputs[1], (void**)&number);
    *sum = 0;
    for (int i = 0; i < 3; i++) *sum += p[i] += (float)row[0] * x[i];
    *number = dtype;
  }
  for (int i = 0; i < 3; i++) aoti_torch_delete_tensor_object(inputs[i]);
  error = fails ? "x is negative" : "";
  return fails;
}
