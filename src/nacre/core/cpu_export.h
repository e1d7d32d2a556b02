// Plain functions of the compiled library that Python calls with ctypes.
#pragma once

#if defined(_WIN32)
#define NACRE_EXPORT extern "C" __declspec(dllexport)
#else
#define NACRE_EXPORT extern "C" __attribute__((visibility("default")))
#endif
