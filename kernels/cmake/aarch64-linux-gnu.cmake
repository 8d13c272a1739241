# Cross-compiling for 64-bit Arm on Linux with Debian's compiler:
#   cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=kernels/cmake/aarch64-linux-gnu.cmake
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
find_program(STREAMO_QEMU qemu-aarch64-static)
if(STREAMO_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${STREAMO_QEMU} -L /usr/aarch64-linux-gnu)
endif()
