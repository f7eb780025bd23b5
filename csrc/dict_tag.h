// dict_tag.h: has a dict changed since it was last looked at? One comparison instead of a look-up a key.
//
// CPython gives a dict a new, globally unique number with every change (PEP 509). Python 3.10 to 3.13 have it; 3.12
// deprecates it in favour of callbacks, which would cost at every change instead of at the question.
#pragma once
#include <Python.h>

#include <cstdint>

namespace fastrunner {

inline std::uint64_t dict_tag(PyObject* dict) {
#if PY_VERSION_HEX < 0x030e0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  static_cast<void>(dict);
  return 0;  // never trusted
#endif
}

}  // namespace fastrunner
