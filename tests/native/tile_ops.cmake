# tile_ops, and libggml-cpu for some instruction sets: <set>-tiles-ours and <set>-tiles-stock, whose ops.cpp and
# binary-ops.cpp are those of STEERMOE_STOCK_TREE. Included by row_products.cmake, run by tests/native/test_tile_ops.py.

add_executable(tile_ops tile_ops.cpp)
target_compile_options(tile_ops PRIVATE -O1 -Wall -Wextra)
target_link_libraries(tile_ops PRIVATE rows_tested)
set_target_properties(tile_ops PROPERTIES BUILD_RPATH ${STEERMOE_LIBS})

set(sse42_flags -msse4.2)

set(tile_others ${others} ${kernels} ${cpu}/repack.cpp ${cpu}/ggml-cpu.c
    ${cpu}/tiled/tiled.cpp ${cpu}/tiled/tiled-kernel.cpp ${dot_rows})
list(REMOVE_ITEM tile_others ${cpu}/ops.cpp ${cpu}/binary-ops.cpp)
add_rows_objects(tile_others ${STEERMOE_TREE} ${tile_others})
target_include_directories(tile_others PRIVATE ${ROOT}/native/src/ggml)
target_compile_options(tile_others PRIVATE -O1 ${avx2_flags})

function(add_tiles_library name set tree)
    set(tree_cpu ${tree}/ggml/src/ggml-cpu)
    add_rows_objects(${name}-ops ${tree} ${tree_cpu}/ops.cpp ${tree_cpu}/binary-ops.cpp)
    target_compile_options(${name}-ops PRIVATE ${rows_optimization} ${${set}_flags})
    target_link_libraries(${name}-ops PRIVATE rows_tested)
    add_library(${name} MODULE $<TARGET_OBJECTS:tile_others> $<TARGET_OBJECTS:${name}-ops>)
    target_link_libraries(${name} PRIVATE rows_tested)
    set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so" BUILD_RPATH ${STEERMOE_LIBS})
endfunction()

foreach(set native avx2 sse42)
    add_tiles_library(${set}-tiles-stock ${set} ${STEERMOE_STOCK_TREE})
    add_tiles_library(${set}-tiles-ours ${set} ${STEERMOE_TREE})
    target_include_directories(${set}-tiles-ours-ops PRIVATE ${ROOT}/native/src/ggml)
endforeach()
